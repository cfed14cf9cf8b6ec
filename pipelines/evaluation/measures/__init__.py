"""What is measured of predicted clips, one file a subject, all behind the interface in `measure.py`."""
