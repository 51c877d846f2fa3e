"""The training setups: one file each, its loop visible; what several setups share lies in :mod:`recipes.lib`."""
