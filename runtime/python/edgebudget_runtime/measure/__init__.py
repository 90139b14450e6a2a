"""Measuring an artifact on the device it runs on: time, layers, memory, energy.

`probe` is the program; it needs what the runtime needs, so that it can be sent to a device.
"""
