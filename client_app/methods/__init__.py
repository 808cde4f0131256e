"""The client halves of the methods; `common.methods` names them."""
