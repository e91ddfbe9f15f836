"""What is learnt: the data of a run, and how samples of it are measured."""
