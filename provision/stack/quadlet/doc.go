// Package quadlet translates a component that comes as container images into
// files for podman's systemd generator (podman-systemd.unit(5)), of which systemd
// makes services: Of decides, whoever calls it writes.
//
// It takes a strict subset of the Compose specification
// (github.com/compose-spec/compose-spec) and of Kubernetes manifests, what podman
// 5.4 does as it says there. Anything else is refused with its line and why. The
// containers run on a node without any other network: no image is ever pulled,
// each is named by the digest that the stack file pins.
package quadlet
