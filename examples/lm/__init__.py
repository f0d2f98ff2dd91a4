"""The parts of train_lm.py: corpus, model, training loop, checkpoint, plots."""
