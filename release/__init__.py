"""What is released and how: wheels and their trial, the checks before a release, a folder for Hugging Face `kernels`.

wheels     make wheels: source distribution and wheels into dist/, each tried in clean environments
pythons    the Pythons that a wheel is for, and where they are on this machine
"""
