"""What every room uses: errors, files, quiet libraries, choices of words."""
