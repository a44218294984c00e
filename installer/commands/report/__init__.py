"""`sidestep report`: shows a node on one self-contained HTML page, for a browser, a mail or paper."""
