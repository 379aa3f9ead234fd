"""The HTML page about finished results: JSON files of other verbs in, one self-contained file out; without torch.

What a run itself reports is `quantkit.pipeline.report`, what an evaluation reports `quantkit_eval.report`. Nothing is
measured here.
"""
