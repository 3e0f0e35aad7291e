"""What files of text look like and how they are read: lines, packed or not, tables, and the forms of other trades."""
