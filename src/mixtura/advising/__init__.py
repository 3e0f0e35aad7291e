"""The verb `advise`: which family to train at a size and a budget, in sentences, as JSON and as a page."""
