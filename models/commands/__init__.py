"""The command line of the models, ``python -m models``, and the training loop behind its ``finetune``."""
