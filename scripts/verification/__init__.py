"""The checks of scripts/verify_device.py: kernels, attention, training and decoding on the attached device.

checks       a check, its rows, and how rows are made, streamed and shown
references   what the checks compare with: NumPy in float64
machine, kernels, attention, packing, training, decoding, peers     the sections, each with a function `checks`
sections     the sections by name
worker       runs one section in a process of its own
"""
