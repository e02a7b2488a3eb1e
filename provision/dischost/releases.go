package dischost

import (
	"net/http"
	"slices"
	"strings"

	"platter/provision"
)

// releases lists the releases of the stack in the store and the nodes that said
// they have them.
func (h *Host) releases(http.ResponseWriter, *http.Request) (any, error) {
	list, err := h.Images.Releases()
	if err != nil {
		h.Log.Error("a release of the stack is damaged", "err", err)
	}
	if err != nil && len(list) == 0 {
		return nil, err
	}
	for i := range list {
		for _, st := range h.rackStates() {
			if slices.Contains(strings.Split(st.Facts[provision.FactStaged], ","), list[i].Digest) {
				list[i].Nodes = append(list[i].Nodes, st.Name)
			}
		}
	}
	return list, nil
}
