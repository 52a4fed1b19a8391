"""Corrections of local steps, moments that travel, and selection of clients by their losses."""
