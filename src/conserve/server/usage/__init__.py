"""Usage of online and flex requests, for bills."""
