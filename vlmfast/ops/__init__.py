"""The ops: one file per family, each holding the definitions and all that tests and benchmarks are made from."""
