"""One file per kind of denoiser. The folder is the list."""
