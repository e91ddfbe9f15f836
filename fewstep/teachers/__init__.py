"""Teachers: pretrained or exact denoisers with what is needed to sample and distil them."""
