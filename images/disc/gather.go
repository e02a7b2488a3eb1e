package disc

import (
	"context"
)

// Gather brings a whole set into a store with one drive. insert is asked for where
// a volume is to be read, the first time without missing, then with the numbers
// of those that are still needed; its error ends the whole. say hears what came of
// each volume: an error of one does not end the others. d and got are nil where
// there are none.
func Gather(ctx context.Context, o ImportOptions, insert func(ctx context.Context, missing []int) (path string, err error), say func(d *Discs, got *Imported, err error)) error {
	var missing []int
	for {
		path, err := insert(ctx, missing)
		if err != nil {
			return err
		}
		complete, err := func() (bool, error) {
			d, err := Open(o.Store.CheckSignature, path)
			if err != nil {
				say(nil, nil, err)
				return false, nil
			}
			defer d.Close()
			got, err := Import(ctx, d, o)
			if ctx.Err() != nil {
				return false, ctx.Err()
			}
			say(d, got, err)
			if got != nil {
				missing = got.Missing
			}
			return err == nil && len(got.Blocked) == 0, nil
		}()
		if err != nil || complete {
			return err
		}
	}
}
