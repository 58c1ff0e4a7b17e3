"""Where prompts come from: every data set yields the same examples."""
