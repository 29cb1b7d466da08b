"""What judges and benchmarks read, made from a run. Nothing else imports it."""
