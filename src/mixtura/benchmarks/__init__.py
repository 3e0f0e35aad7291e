"""How fast the layers are: against a dense layer, against one large matrix product, and against other libraries."""
