"""The block size of each packed linear: measured, chosen and tried."""
