"""Pictures of characters: where typefaces come from, how they are drawn, and the data sets made of them."""
