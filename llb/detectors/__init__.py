"""Anomaly detectors that work on the features of a frozen encoder. They import no run, report or data.

dinomaly.py   the network, its loss, its anomaly map and image score
recipes.py    the two ways to train it: optimiser, schedule and hard mining
"""
