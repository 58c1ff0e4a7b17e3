"""Judge answers: run tests in a sandbox, compare numbers and texts."""
