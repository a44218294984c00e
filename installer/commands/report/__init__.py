"""`sidestep report`: a node on one page of HTML that needs nothing else, for a browser, a mail or paper."""
