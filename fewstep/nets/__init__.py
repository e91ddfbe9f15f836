"""Network architectures, each described by a frozen `Net` that builds it."""
