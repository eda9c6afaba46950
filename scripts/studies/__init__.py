"""The programs that make the study pages of docs/, and their parts."""
