"""Results for people: tables on the terminal, and the page of a search.

terminal     tables and sentences for the terminal, with rich
text         text shortened, and made safe to show
page         a page of ours: templates/ rendered into one file, and that file written
curve        the chart of scores over alpha: where its marks go
answers      the answers of a search: what changes along the grid, with thumbnails
view         everything else a search's page shows: numbers and sentences
search_page  the page of a search
recipe       what a page says of how its search was made, and the command that merges
templates/   Jinja templates, style sheets and the script of the pages
"""
