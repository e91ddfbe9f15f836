"""What distillation methods share: the method itself, the fake score, the critic, guidance."""
