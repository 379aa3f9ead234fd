"""A recipe: YAML to one value with every default filled in, and every mistake of it at once; without torch."""
