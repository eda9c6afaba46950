"""The programs that make the pages of studies in docs/, and their parts."""
