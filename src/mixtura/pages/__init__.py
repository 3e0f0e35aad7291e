"""What every HTML page of Mixtura shares: how templates are filled, the style sheet, the theme switch and printing."""
