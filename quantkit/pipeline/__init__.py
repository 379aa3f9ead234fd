"""The order of the steps: recipe -> plan -> calibrate -> quantize -> write -> verify -> evaluate."""
