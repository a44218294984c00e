"""The commands `takeover` and `giveback`."""
