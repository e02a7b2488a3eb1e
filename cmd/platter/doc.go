// Platter is the one program that people run: it serves a rack, shows and
// steers nodes, builds images and runs the lab. `platter help` lists what it
// can do.
package main
