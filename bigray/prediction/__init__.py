"""A bundle's predictions for a whole data set, part by part, so that what is interrupted goes on."""
