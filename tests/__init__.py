"""One folder for each subject; tests/support has what they share."""
