// Package accept is the report of an acceptance: what was tested on a rack after
// its delivery, what was found, and whether that is enough. It judges and it
// writes the report for people, one HTML file without references to the outside;
// it does no I/O. Package dischost carries the acceptance out.
package accept
