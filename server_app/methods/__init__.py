"""The server halves of the methods; `common.methods` names them."""
