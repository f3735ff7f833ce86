"""What takes part in a transaction: resource managers and the server that speaks for them."""
