"""`sidestep flows`: with whom pods' connections are and were, and what they carry."""
