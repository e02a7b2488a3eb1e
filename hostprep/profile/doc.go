// Package profile is the catalogue of kernel settings: what a host may be told
// about its command line, sysctls, sysfs, disks, CPUs, modules, limits and
// alarms, each with the values that make sense, why, and where that is written
// down. The named profiles are YAML files beside this one. It does no I/O.
package profile
