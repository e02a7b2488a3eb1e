// Package hostcmd is the command `host` of both programs: people and units
// check, apply, repair and undo the preparation of a host with it.
package hostcmd
