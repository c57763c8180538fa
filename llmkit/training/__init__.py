"""What turns windows into a checkpoint: arguments, schedules, optimizers, and Trainer extended at its seams."""
