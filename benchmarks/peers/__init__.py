"""Models to compare with, where no package of their own has them."""
