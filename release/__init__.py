"""What is released and how: wheels and their trial, the checks before a release, a folder for Hugging Face `kernels`.

wheels     make wheels: source distribution and wheels into dist/, each tried in clean environments
trial      what is run in each of them
check      make release: what must hold before, and of the files that are published
hub        make hub: the operations in Triton as a folder that Hugging Face `kernels` loads
pythons    the Pythons that a wheel is for, and where they are on this machine
"""
