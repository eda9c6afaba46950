"""What the command `plan` is made of."""
