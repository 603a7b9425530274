"""The command ``lockstep pack``: shards of folders of images, or of any map-style dataset."""
