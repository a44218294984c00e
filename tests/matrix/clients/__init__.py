"""What calls the servers, each a program of its own that runs in the client's pod."""
