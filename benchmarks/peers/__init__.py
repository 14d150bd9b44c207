"""Other people's published designs, written anew and as small as can be, to be measured beside ours."""
